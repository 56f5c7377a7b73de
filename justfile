# Everyday commands; `just` lists them.

default:
    @just --list

# Formatting and lints, as CI runs them.
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# All tests.
test:
    cargo test --release

# Golden logits of every reference model in FOLDER (models/ and vectors/ inside) by way of the command line.
golden FOLDER:
    cargo build --release
    tools/golden.py {{FOLDER}}

# Speed of each hot routine.
bench:
    cargo bench -p ds4-cpu

# Fuzz every reader for SECONDS.
fuzz SECONDS="60":
    tools/fuzz.sh {{SECONDS}}
