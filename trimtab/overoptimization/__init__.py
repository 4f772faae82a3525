"""What happens to the true reward while a proxy of it is optimized."""
