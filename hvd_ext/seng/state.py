"""What SENG keeps between steps besides its counters."""

from hvd_ext.state import DROP, OWN, RANK, Part

CURVATURE = Part("preconditioner", RANK, "SENG's curvature", OWN, DROP)  # recomputed at the next step
STATE = (CURVATURE,)
