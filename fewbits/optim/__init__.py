"""What updates the weights: master weights, moments, clipping, loss scale, schedule."""
