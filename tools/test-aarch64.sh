#!/usr/bin/env bash
# Tests the NEON kernels, on an aarch64 that QEMU emulates.
#
# That takes a standard library for aarch64: one that is installed or that rustup has, or one built
# from source. The source comes with rustup, or from a Debian package of the compiler's version.
set -euo pipefail
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu
sysroot=$(rustc --print sysroot)

debian_source() {
    local version mirror work
    version=$(rustc --version | cut -d' ' -f2)
    mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' |
        sed -n 's/^Debian //p' | head -n 1)
    [ -n "$mirror" ] || return 1
    work=$(mktemp -d)
    mkdir -p "$work/lists/partial" "$work/source"
    for suite in trixie-backports sid; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
    done >"$work/list"
    local options=(-o "Dir::Etc::sourcelist=$work/list" -o Dir::Etc::sourceparts=/nonexistent
        -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work")
    apt-get -qq "${options[@]}" update
    (cd "$work" && apt-get -qq "${options[@]}" download "rust-src=$version*")
    dpkg -x "$work"/rust-src_*.deb "$work/source"
    mkdir -p "$sysroot/lib/rustlib/src"
    rm -rf "$sysroot/lib/rustlib/src/rust"
    cp -r "$work/source/usr/src/rustc-$version" "$sysroot/lib/rustlib/src/rust"
    rm -rf "$work"
}

flags=()
if [ ! -d "$sysroot/lib/rustlib/$target/lib" ] && ! rustup target add "$target" 2>/dev/null; then
    if [ ! -e "$sysroot/lib/rustlib/src/rust/library/Cargo.lock" ]; then
        rustup component add rust-src 2>/dev/null || debian_source ||
            { echo "NOT TESTED on aarch64: no standard library for it can be had here"; exit 0; }
    fi
    # An unstable feature, which the stable compiler has too.
    export RUSTC_BOOTSTRAP=1
    flags=(-Zbuild-std)
fi
# A dependency is written in C++.
for package in aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64:qemu-user; do
    command -v "${package%:*}" >/dev/null ||
        { apt-get -qq update && apt-get -qq install -y "${package#*:}" >/dev/null; }
done
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-g++
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
cargo test --release --target "$target" -p ds4-cpu "${flags[@]}" \
    --lib --test simd_products --test simd_attention
