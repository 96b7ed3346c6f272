"""What is inside a trained model: interventions, routing, aspects of the profile, transfer between services."""
