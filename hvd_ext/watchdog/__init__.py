"""No wait without a deadline: the watchdog, and the status that ranks give each other."""
