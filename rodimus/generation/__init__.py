"""Generation for many sequences at once, at constant memory and time per token."""
