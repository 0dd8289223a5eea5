"""What the student learns: teacher and student side by side, and the terms of the loss."""
