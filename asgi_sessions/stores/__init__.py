"""Where records live: `base` says what a store promises, the others keep the promise."""
