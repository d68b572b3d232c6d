#!/usr/bin/env bash
# The browser of these tests on Debian or Ubuntu, 64 MB. Does nothing where there is one.
set -euo pipefail
for name in chromium-headless-shell chromium google-chrome; do
  if hash "$name" 2>/dev/null; then exit 0; fi
done
[ "$(id -u)" = 0 ] || { echo "$0: run it as root, once: sudo $0" >&2; exit 1; }
apt-get update -qq
apt-get install -qq --yes --no-install-recommends chromium-headless-shell fonts-dejavu-core ||
  apt-get install -qq --yes --no-install-recommends chromium
