"""What this project could not try for want of a GPU: `make gpu-check` tries it, and writes a report to send to us."""
