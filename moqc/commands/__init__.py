"""The commands of `moqc`, one module each; they read options, call `moqc.api` and print."""
