"""What a trained network would cost on the hardware of its paper: energy, area, latency."""
