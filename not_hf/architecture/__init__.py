"""What is known of native models."""
