#!/usr/bin/env bash
# Makes the pictures of the README, docs/images/report*.png: the report on docs/results, in Chromium.
#   scripts/report_pictures.sh PYTHON      a Python that has analysis/ installed, e.g. build/host/python-tests/bin/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:?give a Python that has analysis/ installed}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m nsa_analysis report docs/results -o "$folder/report.html"
# The list of runs is as long as there are runs: the pictures go without it.
"$python" -c "import re, sys
text = open(sys.argv[1]).read()
open(sys.argv[1], 'w').write(re.sub(r'<h2 id=\"runs\">.*?(?=<section><h2)', '', text, flags=re.S))" "$folder/report.html"

# picture NAME WIDTH FROM TO SCHEME: rows FROM to TO of the page; scheme 0 is dark, 1 light
picture() {
  chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$folder/profile" \
    --window-size="$2,$4" --blink-settings=preferredColorScheme="$5" --screenshot="$folder/$1.png" \
    "file://$folder/report.html" 2>/dev/null
  "$python" -c "import sys; from PIL import Image
picture = Image.open(sys.argv[1]).convert('RGB').crop(tuple(map(int, sys.argv[3:])))
picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(sys.argv[2], optimize=True)" "$folder/$1.png" "docs/images/$1.png" 0 "$3" "$2" "$4"
}
mkdir -p docs/images
picture report 1180 0 1720 1
picture report_phone 390 690 2250 0
