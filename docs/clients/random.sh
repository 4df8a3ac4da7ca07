#!/bin/sh
# Prints one number. Usage: random.sh [URL] [POOL], a token in TOMBOLA_TOKEN.
# curl asks again after 503 and 429, as many seconds later as Retry-After says.
# After a failed try curl writes its body too: the answer that counts is the last.
set -eu
url=${1:-http://127.0.0.1:8000}
pool=${2:-int}

# The token comes from standard input: what is on the command line, `ps` shows to everyone.
answer=$(printf '%s' "${TOMBOLA_TOKEN:+Authorization: Bearer $TOMBOLA_TOKEN}" |
  curl --silent --show-error --fail-with-body --retry 9 --retry-connrefused --max-time 60 \
    --header @- "$url/random?type=$pool") || { echo "$answer" >&2; exit 1; }

# The number as the text that came: 5.100000, not 5.1.
printf '%s\n' "$answer" | sed 's/.*"number":\([^,}]*\).*/\1/'
