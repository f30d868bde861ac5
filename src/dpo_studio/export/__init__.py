"""Exports: a run's adapter, its merged model or a quantised folder, verified before it is finished."""
