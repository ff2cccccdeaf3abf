"""Parts that strategies and scenarios share: no policy, only mechanism."""
