"""The state of reducers that keep what they do not send."""

from hvd_ext.state import MEAN, PARAMETERS, RANK, Part

RESIDUAL = Part("residual", RANK, "residuals", PARAMETERS, MEAN, scaled=True)
STATE = (Part("steps"), Part("skipped_steps"), RESIDUAL)
