"""What ranks must have in common, and the error that names what differs."""
