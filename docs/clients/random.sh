#!/bin/sh
# Prints one number. Usage: random.sh [URL] [POOL]. The token comes from TOMBOLA_TOKEN.
# curl retries after 503 and 429, and waits as many seconds as Retry-After says.
# curl also writes the bodies of failed attempts; the last body is the one that counts.
set -eu
url=${1:-http://127.0.0.1:8000}
pool=${2:-int}

# The token goes through standard input because `ps` shows command lines to every user.
response=$(printf '%s' "${TOMBOLA_TOKEN:+Authorization: Bearer $TOMBOLA_TOKEN}" |
  curl --silent --show-error --fail-with-body --retry 9 --retry-connrefused --max-time 60 \
    --request POST --header @- "$url/random?type=$pool") || { echo "$response" >&2; exit 1; }

# Prints the text that the server sent: 5.100000, not 5.1, or a code without quotes.
printf '%s\n' "$response" | sed -e 's/.*"number":\([^,}]*\).*/\1/' -e 's/.*"code":"\([^"]*\)".*/\1/'
