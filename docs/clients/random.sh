#!/bin/sh
# Prints one number. Usage: random.sh [URL] [POOL]. The token comes from TOMBOLA_TOKEN.
# curl retries after 503, 429 and a lost response, and waits as many seconds as Retry-After says. All attempts
# have the same Idempotency-Key, so the server takes only one number.
# curl also writes the bodies of failed attempts; the last body is the one that counts.
set -eu
url=${1:-http://127.0.0.1:8000}
pool=${2:-int}
key=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')

# The token goes through standard input because `ps` shows command lines to every user. Without --fail, curl
# does not count the other errors as failures, so --retry-all-errors does not retry them.
response=$(printf '%s\n' "Idempotency-Key: $key" "${TOMBOLA_TOKEN:+Authorization: Bearer $TOMBOLA_TOKEN}" |
  curl --silent --show-error --retry 9 --retry-all-errors --max-time 10 --write-out '\n%{http_code}' \
    --request POST --header @- "$url/random?type=$pool")
case $response in
  *[!0-9]200) ;;
  *) echo "$response" >&2; exit 1 ;;
esac

# Prints the text that the server sent: 5.100000, not 5.1, or a code without quotes.
printf '%s\n' "$response" | sed -n -e '$d' -e 's/.*"number":\([^,}]*\).*/\1/p' -e 's/.*"code":"\([^"]*\)".*/\1/p'
