"""Small worlds in which every answer can be listed, so that optimum, divergence and gradient are known exactly."""
