#!/usr/bin/env bash
# Renders the images of the README, docs/images/report*.png: the report on docs/results, in Chromium.
#   scripts/report_pictures.sh PYTHON      a Python with analysis/ installed, e.g. build/host/python-tests/bin/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:?give a Python with analysis/ installed}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export NSA=${NSA:-build/host/nsa} # evaluates the gate
"$python" -m nsa_analysis report docs/results -o "$folder/report.html"
# Chromium windows are at least 500 pixels wide: a frame in the window shows the phone layout.
echo "<body style='margin:0'><iframe src=report.html style='border:0;width:390px;height:5400px'></iframe>" \
  >"$folder/phone.html"

# picture NAME PAGE WIDTH FROM TO SCHEME: rows FROM to TO of the page; scheme 0 is dark, 1 light
picture() {
  chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$folder/profile" \
    --window-size="$(($3 < 500 ? 500 : $3)),$5" --blink-settings=preferredColorScheme="$6" \
    --screenshot="$folder/$1.png" "file://$folder/$2.html" 2>/dev/null
  "$python" -c "import sys; from PIL import Image
picture = Image.open(sys.argv[1]).convert('RGB').crop(tuple(map(int, sys.argv[3:])))
picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(sys.argv[2], optimize=True)" \
    "$folder/$1.png" "docs/images/$1.png" 0 "$4" "$3" "$5"
}
mkdir -p docs/images
picture report report 1180 0 2660 1
picture report_phone phone 390 2590 5240 0
