"""Leaving: a run's adapter, its merged model or one quantised folder, looked at again before it is called done."""
