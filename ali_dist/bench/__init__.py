"""Speed side by side with what a user would otherwise run: every ratio from one process run."""
