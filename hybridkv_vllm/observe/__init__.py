"""What operators see: counters on /metrics and the HTTP routes."""
