#!/bin/sh
# Sets up the peer: CRIU from Debian trixie, in a directory of its own, for the tests that exchange images
# with it and for the benchmark. Prints the path of a wrapper that runs it like an ordinary `criu`.
#
# Idempotent: a finished directory is left as it is. Needs root, debootstrap, and Debian's package mirror as
# this machine's apt already knows it.
set -eu

peer=${CRTOOLS_PEER:-/var/cache/crtools-peer}
suite=trixie
root=$peer/$suite
wrapper=$peer/criu

if [ -x "$wrapper" ] && "$wrapper" --version >/dev/null 2>&1; then
    echo "$wrapper"
    exit 0
fi

if ! command -v debootstrap >/dev/null; then
    echo "peer: debootstrap is missing; apt-get install debootstrap" >&2
    exit 1
fi

# Both spellings of apt sources: deb822 ("URIs: ...") and one line ("deb [options] URI suite ...").
# The security archive has no base suite, so it is passed over.
mirror=$(
    {
        sed -n 's/^URIs:[[:space:]]*//p' /etc/apt/sources.list.d/*.sources 2>/dev/null | tr ' ' '\n'
        sed -n 's/^deb[[:space:]]*\(\[[^]]*\][[:space:]]*\)\{0,1\}\([^[:space:]]*\).*/\2/p' \
            /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null
    } | grep '/debian/\{0,1\}$' | head -n 1
)
if [ -z "$mirror" ]; then
    echo "peer: no Debian mirror in the apt sources of this machine" >&2
    exit 1
fi

mkdir -p "$peer"
# A half-made tree of an interrupted run is useless to debootstrap.
rm -rf "$root.new" "$root"
debootstrap --variant=minbase --include=criu "$suite" "$root.new" "$mirror" >"$peer/debootstrap.log" 2>&1 || {
    tail -n 20 "$peer/debootstrap.log" >&2
    exit 1
}
mv "$root.new" "$root"

# The loader and the libraries of its own release: the host may be older than they are.
case $(uname -m) in
    x86_64) loader=lib64/ld-linux-x86-64.so.2 libraries=x86_64-linux-gnu ;;
    aarch64) loader=lib/ld-linux-aarch64.so.1 libraries=aarch64-linux-gnu ;;
    *) echo "peer: no CRIU for $(uname -m) here" >&2; exit 1 ;;
esac
cat >"$wrapper.new" <<END
#!/bin/sh
exec '$root/$loader' --library-path '$root/usr/lib/$libraries' '$root/usr/sbin/criu' "\$@"
END
chmod 755 "$wrapper.new"
mv "$wrapper.new" "$wrapper"
"$wrapper" --version >&2
echo "$wrapper"
