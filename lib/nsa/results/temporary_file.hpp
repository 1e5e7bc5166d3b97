#pragma once
// The temporary file beside a result file: every point is written to it, and it takes the place of the file. Texts too
// are written beside the file that they replace.

#include <string>

namespace nsa {

/// "<path>.<host>.<pid>.tmp", unique among processes: hosts that share a file system may use the same pid.
std::string temporary_name(const std::string& path);

/// Removes the temporary files that killed runs left beside `path`. A file of another name or content stays, and so
/// does that of a run that may still be alive: of a live process of this host, or changed within ten minutes on another
/// host.
void remove_leftovers(const std::string& path);

/// Copies `path` to `temporary`. Throws UserError(file).
void copy_to_temporary(const std::string& path, const std::string& temporary);

/// Syncs the file to disk. Throws UserError(file).
void sync_file(const std::string& path);

/// Renames the temporary file, which is synced, to `path`, and syncs the folder. Without `replace` there must be no
/// file of that name: another run may have created it. Throws UserError(file).
void publish(const std::string& temporary, const std::string& path, bool replace);

/// Writes a text file in place of the one that is there, once it is whole; nothing where the path is empty. Throws
/// UserError(file), which names the option that chooses the path.
void write_text_file(const std::string& path, const char* option, const std::string& text);

}  // namespace nsa
