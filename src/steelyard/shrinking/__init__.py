"""The smallest weights within a tolerance. Lazy: nothing heavy is imported before it is used."""
