"""A stage is trained: one step, the loop around it, and what watches over both."""
