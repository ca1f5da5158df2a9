"""An OpenAI-compatible endpoint on the user's own device, which drafts for unmodified clients."""
