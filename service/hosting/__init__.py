"""Server processes: a single one, several workers behind one port, or replicas of Ray Serve."""
