"""From audio to features: one definition, shared by feature extraction, training and scoring."""
