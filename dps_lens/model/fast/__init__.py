"""What makes passes fast: caches with room, attention to a shared prompt in place, steps without idle hook points."""
