"""What each model family is: config, parameters, blocks and costs, written once against the op set. No torch."""
