@echo off
rem The same as start.sh, for Windows. Untested.
cd /d "%~dp0"
if not exist .venv\Scripts\python.exe py -3 -m venv .venv || exit /b 2
fc /b requirements.txt .venv\installed.txt >nul 2>&1
if errorlevel 1 (
  .venv\Scripts\python -m pip install -q -r requirements.txt || exit /b 1
  copy /y requirements.txt .venv\installed.txt >nul
)
.venv\Scripts\python server.py %*
