"""What a model says under a rounded cache, against what it says with an exact cache."""
