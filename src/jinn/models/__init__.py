"""What each model family is: config, parameters and blocks, written once against the op set. No torch."""
