"""Files for deployment, each checked against the trained model."""
