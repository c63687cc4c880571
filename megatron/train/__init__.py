"""Training: one step, the loop around it, what it reports, and how it starts, stops and resumes."""
