"""What is learnt: states, targets, losses, masks."""
