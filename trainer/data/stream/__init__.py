"""A log that grows: windows that arrive one after the other, each trained once."""
