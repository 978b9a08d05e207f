"""The state of reducers that keep what they do not send."""

from hvd_ext.state import MEAN, PARAMETERS, RANK, STEPS, Part

SKIPPED_STEPS = Part("skipped_steps")
RESIDUAL = Part("residual", RANK, "residuals", PARAMETERS, MEAN, scaled=True)
STATE = (STEPS, SKIPPED_STEPS, RESIDUAL)
