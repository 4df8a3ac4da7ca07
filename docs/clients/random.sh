#!/bin/sh
# Prints one number. Usage: random.sh [URL] [POOL], a token in TOMBOLA_TOKEN.
# curl asks again after 503 and 429, as many seconds later as Retry-After says.
set -eu
url=${1:-http://127.0.0.1:8000}
pool=${2:-int}

answer=$(curl --silent --show-error --fail-with-body --retry 9 --retry-connrefused --max-time 60 \
  ${TOMBOLA_TOKEN:+--header "Authorization: Bearer $TOMBOLA_TOKEN"} \
  "$url/random?type=$pool") || { echo "$answer" >&2; exit 1; }

# The number as the text that came: 5.100000, not 5.1.
printf '%s\n' "$answer" | sed 's/.*"number":\([^,}]*\).*/\1/'
