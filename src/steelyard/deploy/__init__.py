"""What runs elsewhere, and the measurement that it does. Lazy: nothing heavy is imported before it is used."""
