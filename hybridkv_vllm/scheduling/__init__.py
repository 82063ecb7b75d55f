"""The scheduler's side: what a request may hold, when its prompt is compressed and what is given back."""
