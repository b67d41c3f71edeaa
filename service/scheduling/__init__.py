"""What is admitted and what runs next. Pure: no torch, no threads, no clock, no waiting."""
