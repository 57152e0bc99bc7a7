"NCT-CRC-HE-100K as folders: data_scripts/nct_crc.py --root DIR [--source ARCHIVE_OR_FOLDER_OR_URL]"

import sys

from glsd.data.fetching import command

if __name__ == '__main__':
    sys.exit(command('nct_crc'))
