"""TopK with error feedback, AMSGrad, their oracle."""
