set -e -o pipefail
turn=0
until [ -e stop ]; do
    turn=$((turn + 1))
    echo "turn $turn" | tr a-z A-Z | sed 's/$/!/' | cat >>turns
    echo "$turn"
done | grep --line-buffered . | sed -u 's/.*/<&>/' | cat >>lines
