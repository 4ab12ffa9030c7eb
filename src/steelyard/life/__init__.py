"""The whole life of a network's weights, as one recipe: `steelyard run`."""
