#pragma once
// What the paths of a command name, before it computes or removes anything. Nothing here throws an error of the system
// library: a file system may refuse any call, and the answer says so.

#include <string>
#include <vector>

namespace nsa {

/// Throws UserError(ExitCode::file): "<problem> (<why>); <advice>".
[[noreturn]] void file_error(const std::string& problem, const std::string& why, const std::string& advice);

/// What a path names, links followed.
struct PathStatus {
  enum Kind { missing, file, folder, other } kind = missing;
  int error = 0;  ///< errno of a path that cannot be looked up, that of a missing one included; else 0
};
PathStatus status_of(const std::string& path);

/// Why the path names no file that can be read at any place: "no such file", "it is a folder", "not a plain file" (a
/// pipe would wait for ever), or what the system says; "" if it names one.
std::string why_no_file(const std::string& path);

/// The folder that holds the path; "." for a bare name.
std::string parent_of(const std::string& path);

/// Why no file can be created in the folder; "" if one can.
std::string why_not_writable(const std::string& folder);

/// The path with links at its end followed, also one to a file that does not exist.
std::string follow_links(const std::string& path);

/// Whether both paths name one file: by device and inode, or, if neither exists yet, by name in the same folder.
bool same_file(const std::string& a, const std::string& b);

/// Names in the folder; empty if it cannot be read.
std::vector<std::string> names_in(const std::string& folder);

/// Copies a file to a new one. Returns why it could not; "" if it could.
std::string copy_file(const std::string& from, const std::string& to);

/// Whether the file has the signature of HDF5, at its start or behind a user block.
bool is_hdf5(const std::string& path);

/// A path of a command line or input. An empty path is no file.
struct NamedFile {
  enum Use { read, result, text } use;  ///< result: written as HDF5; text: written as text, which replaces a file
  std::string path;
  std::string name;    ///< in messages: "the input", "the CSV"
  std::string option;  ///< that chooses it: "--csv"
};

/// Throws UserError(file) unless every written file is another one than all the others of the list, and every text file
/// can be written and replaces no folder, device or HDF5 file.
void check_written_files(const std::vector<NamedFile>& files);

}  // namespace nsa
