"""An OpenAI-compatible endpoint over a policy: the protocol, the batches on the device, the HTTP application."""
