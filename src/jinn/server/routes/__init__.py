"""One file per API. Each maps a body to a GenerationRequest, and its events back to that API's wire form."""
